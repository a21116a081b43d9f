//! The daemon: answers the kernel, and starts and stops LUNs.
