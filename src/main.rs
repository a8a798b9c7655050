//! The `respodiff` command.

fn main() -> std::process::ExitCode {
    respodiff::cli::main()
}
