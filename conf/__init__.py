"""The Hydra configs: a folder is a group, a file in it a choice. Importable as `lightning_prune.conf`."""
