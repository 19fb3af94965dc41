"""What people look at: readers of the run folder. Training never imports this."""
