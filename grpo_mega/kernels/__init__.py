"""Numerical kernels: one signature each, whatever the device."""
