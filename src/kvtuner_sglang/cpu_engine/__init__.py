"""What a server process needs where there is no GPU."""
