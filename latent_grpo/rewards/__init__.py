"""The value of a response: reward functions, and how answers are read and compared."""
