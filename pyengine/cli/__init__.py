"""The commands: thin programs over the library, one file each."""
