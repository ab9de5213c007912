"""Side by side with what people use today: one command measures everything in one run. See `__main__`."""
