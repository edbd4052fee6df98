"""Model families, and walking a model one decoder layer at a time."""
