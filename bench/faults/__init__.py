"""Every command, struck by signals, by streams and disks that take nothing, and by caches that hold rubbish."""
