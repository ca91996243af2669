"""Rehearsals between hosts, which need root: `make faults-hosts`."""
