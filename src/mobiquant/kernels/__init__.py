"""Fast paths, one file each, imported only where they can run; every one has a slow path in torch that it is tested against."""
