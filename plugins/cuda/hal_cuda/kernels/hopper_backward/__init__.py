"""The backward of attention for Hopper, in Gluon."""
