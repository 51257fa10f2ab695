"""Checked samples as token ids and labels on disk, and the order in which a run reads them."""
