"""The numerical guard: notices spoiled steps, and takes the run back to before them."""
