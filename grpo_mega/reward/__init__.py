"""What a response is worth: each reward is one class, and the assembly adds them up."""
