"""The targets, one folder each. `moec.artefact.targets` finds the folders; no list names them."""
