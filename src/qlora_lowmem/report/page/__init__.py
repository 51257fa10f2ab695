"""The page that people look at: what the project's commands wrote as JSON, as one HTML file that needs nothing else."""
