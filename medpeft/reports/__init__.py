"""The numbers: what trains, and what a step costs."""
