//! One module per promise.

mod access;
mod compatible;
mod hostile;
mod repeatable;
mod shared;
mod site;
mod truncation;
