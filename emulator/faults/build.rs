//! Compiles the faulty kernels in the same way as those of the engine.

include!("../instrumented.rs");

fn main() {
    println!("cargo::rerun-if-changed=faults.cu");
    compile("faulty_kernels", "../../kernels", ["faults.cu".into()]);
}
