"""What diagnoses and visual concepts are called: the ontology, the list of concepts, and what they cover."""
