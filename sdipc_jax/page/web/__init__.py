"""What needs the extra `page`: the API, the page itself, and the server of both."""
