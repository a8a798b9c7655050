//! Compiles the faulty kernels as those of the engine are compiled.

include!("../instrumented.rs");

fn main() {
    println!("cargo::rerun-if-changed=faults.cu");
    compile("faulty_kernels", "../../kernels", ["faults.cu".into()]);
}
