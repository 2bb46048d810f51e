"""What a model is made of: the only room that knows a library or the name of a class."""
