"""What a job's memory was: read from torch.cuda and NVML, the same way on a real and a virtual GPU."""
