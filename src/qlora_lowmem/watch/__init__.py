"""A terminal view of a running job's memory: NVML's figures of the card, the allocator's where it is our job."""
