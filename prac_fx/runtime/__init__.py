"""What runs in each training step, and the state that it keeps, saves and loads."""
