"""Reading video files."""
