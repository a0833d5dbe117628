"""The targets: a folder for each, found by `moec.artefact.targets`; nothing lists them."""
