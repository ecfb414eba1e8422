"""What the commands beside training do, one file each."""
