//! Launches of `kernels/norm.cu`.
