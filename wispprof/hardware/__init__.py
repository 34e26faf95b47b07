"""What machine this is, and what its sensors say."""
