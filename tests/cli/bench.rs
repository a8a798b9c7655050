//! `respodiff bench`.

use super::{respodiff, text};

/// Without a GPU, the kernels of each operation are printed for each card, and the reason if a convolution gets none of
/// the H100's own kernels.
#[test]
fn bench_tells_the_kernels_of_cards_that_are_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let plans = |card: &str, filter: &str| {
        let output = respodiff(folder.path(), &["bench", "--plans", card, "--filter", filter]);
        assert!(output.status.success(), "{output:?}");
        text(&output.stdout)
    };
    let told = plans("h100", "conv3x3");
    assert!(told.contains("conv_hopper_160 ") && told.contains("conv3x3 2x32x32 320->320 half"), "{told}");
    assert!(told.contains("(its result's channels are not a multiple of 8)"), "{told}");
    assert!(told.contains("(its sources' channels are not multiples of 64)"), "{told}");
    for card in ["a100", "rtx-3090", "rtx-4090", "b200", "rtx-5090"] {
        let told = plans(card, "attention");
        assert!(told.contains("attention 2x8x160 64x64") && !told.contains("hopper") && !told.contains('('), "{told}");
    }
    assert!(plans("rtx-4090", "attention").contains("attention_512_64_16 64x1x1"));
    assert_eq!(respodiff(folder.path(), &["bench", "--plans", "h1000"]).status.code(), Some(2));
}

#[test]
fn bench_times_the_operations_that_the_filter_names() {
    let folder = tempfile::tempdir().unwrap();
    let arguments =
        ["bench", "--model", "demo", "--device", "cpu", "--runs", "1", "--filter", "attention", "--json", "b.json"];
    let output = respodiff(folder.path(), &arguments);
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("b.json")).unwrap()).unwrap();
    assert!(report["peaks"]["launch"].as_f64().unwrap() > 0.0, "{report}");
    let rows: Vec<&serde_json::Value> =
        report["networks"].as_array().unwrap().iter().flat_map(|network| network["rows"].as_array().unwrap()).collect();
    assert!(rows.len() >= 4);
    for row in rows {
        assert_eq!(row["case"]["kind"], "attention");
        assert!(row["seconds"].as_f64().unwrap() > 0.0 && row["flops"].as_f64().unwrap() > 0.0, "{row}");
        assert!(text(&output.stdout).contains(row["label"].as_str().unwrap()));
    }
    let gradients =
        ["bench", "--model", "demo", "--training", "--device", "cpu", "--runs", "1", "--filter", "attention gradient"];
    let output = respodiff(folder.path(), &gradients);
    assert!(output.status.success() && text(&output.stdout).contains("attention gradient 1x4x16 64x77"), "{output:?}");
    let nothing = respodiff(
        folder.path(),
        &["bench", "--model", "demo", "--device", "cpu", "--runs", "1", "--filter", "nonsense"],
    );
    assert_eq!(nothing.status.code(), Some(2));
}

/// An earlier report is compared by network, by family and by operation, within 120 columns.
#[test]
fn bench_compares_with_an_earlier_run() {
    let folder = tempfile::tempdir().unwrap();
    let bench = ["bench", "--model", "demo", "--device", "cpu", "--runs", "1", "--filter", "vae"];
    let run = |more: &[&str]| {
        let output = respodiff(folder.path(), &[&bench[..], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        output
    };
    run(&["--json", "b.json"]);
    // The report is changed: every time is a millionth, and the device is another.
    let path = folder.path().join("b.json");
    let mut report: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    report["device"] = "another".into();
    for row in report["networks"][0]["rows"].as_array_mut().unwrap() {
        let quantiles = ["least", "seconds", "p90"].map(|key| row[key].as_f64().unwrap());
        assert!(quantiles.is_sorted() && quantiles[0] > 0.0, "{row}");
        row["seconds"] = (quantiles[1] / 1e6).into();
    }
    std::fs::write(&path, report.to_string()).unwrap();
    let output = run(&["--compare", "b.json"]);
    assert!(text(&output.stderr).contains("another"), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    let (own, compared) = table.split_once("vae beside the earlier run").unwrap();
    let column = |line: &str| line.rsplit(' ').next().and_then(|number| number.parse::<f64>().ok());
    for line in table.lines() {
        assert!(line.chars().count() <= 120, "{line}");
    }
    // The last column is the percentage of the best rate.
    assert!(own.lines().filter(|line| line.contains("x")).all(|line| column(line).is_none_or(|best| best <= 100.0)));
    let ratio = |name: &str| compared.lines().find(|line| line.starts_with(name)).and_then(column).unwrap();
    assert!(ratio("all convolutions") > 100.0 && ratio("all group norms") > 100.0, "{compared}");
    assert!(ratio("a step in one piece") < 100.0, "{compared}");
    // The five operations that take longest beside before, whichever they are.
    let sums = |line: &str| line.starts_with("all ") || line.starts_with("a step");
    assert_eq!(compared.lines().skip(1).filter(|line| column(line).is_some() && !sums(line)).count(), 5, "{compared}");
    // A file that is not a report is refused before anything is measured.
    std::fs::write(&path, "{}").unwrap();
    let output = respodiff(folder.path(), &[&bench[..], &["--compare", "b.json"]].concat());
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{}", text(&output.stderr));
}
