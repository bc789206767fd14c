"""Speech as strings of discrete tokens: the codes of a trained quantizer, numbered by a dictionary."""
