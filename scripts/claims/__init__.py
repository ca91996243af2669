"""What the scripts that try the paper's claims share."""
