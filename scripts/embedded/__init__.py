"""The stages of scripts/train_embedded.py."""
