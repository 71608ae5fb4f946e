mod backends;
mod experiments;
mod gradients;
mod oracle;
mod parity;
