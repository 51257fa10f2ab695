"""Tables for people and machines, made of profiles; nothing is computed here that a profile does not say."""
