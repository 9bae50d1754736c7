"""Programs of one file each that show what the collectives are for; see README.md here."""
