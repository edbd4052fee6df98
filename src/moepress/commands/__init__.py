"""`moepress results`, `compare`, `show`, `clean`: what there is among the results. Computes nothing, imports no torch."""
