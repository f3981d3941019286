"""What a run shows and keeps: metrics, console, files, pictures."""
