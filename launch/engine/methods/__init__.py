"""What is trained: one small file per method, all with the interface in `protocol`, listed in `registry`."""
