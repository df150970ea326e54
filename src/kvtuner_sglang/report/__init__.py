"""What people read, drawn from records alone: the Markdown report and the console's summary."""
