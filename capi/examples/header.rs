//! Prints the C header: `cargo run -p respodiff-capi --example header > capi/respodiff.h`.

fn main() -> Result<(), cbindgen::Error> {
    cbindgen::generate(env!("CARGO_MANIFEST_DIR"))?.write(std::io::stdout());
    Ok(())
}
