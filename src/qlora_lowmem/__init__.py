"""Will this fine-tuning run fit on that GPU, and how do we keep it fitting?"""

__version__ = "0.1.0"
