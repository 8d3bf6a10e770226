"""Training under torchrun: LightningCLI with energy and lineage wired in, or two callbacks in a script of one's own."""
