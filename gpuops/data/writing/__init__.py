"""From HDF5, NetCDF, Zarr or arrays to a checked, sharded, committed store."""
