"""How a change gets into a forward pass, and what it leaves on the model."""
