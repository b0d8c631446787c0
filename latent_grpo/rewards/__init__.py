"""What a response is worth: reward functions, and how an answer is read and compared."""
