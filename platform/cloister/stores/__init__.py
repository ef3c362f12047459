"""Where things are kept: state (`database`), sealed bytes (`blobs`), keys (`keys`). Storage is never trusted."""
