"""What speaks to the OpenCL driver."""
