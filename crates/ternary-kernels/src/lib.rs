//! Products of ternary and int8 matrices for CPUs, chosen at run time. All `unsafe` of the project lives here.
