//! The page in a browser: no console message, no horizontal overflow, no network.
//!
//! Needs Chromium (`apt-get install chromium`); without it the browser's part is ignored, and with
//! MAPGPA_REQUIRE_CHROMIUM=1 in the environment it fails.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers fail the test, too")]

mod harness;
mod support;

use std::process::Command;

use harness::{Needs, harness};
use support::Scratch;
use support::command::{code, output, stderr};

/// Widths of the page in pixels: a phone and a desktop.
const WIDTHS: [u32; 2] = [380, 1400];

/// A browser that loads a page and prints what it made of it.
fn browser() -> Command {
    let mut command = Command::new(harness::chromium().expect("checked before"));
    command.args([
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        "--window-size=1500,900",
        "--dump-dom",
    ]);
    command
}

/// What is wrong with a page, in frames of these widths. The outer page writes what it finds into
/// its own text, where --dump-dom shows it.
fn faults(mut browser: Command, scratch: &Scratch, page: &str) -> Vec<String> {
    let outer = scratch.path("outer.html");
    let script = format!(
        "<!DOCTYPE html><body><pre id=out></pre><script>
        const out = document.getElementById('out');
        for (const width of {WIDTHS:?}) {{
            const frame = document.createElement('iframe');
            frame.style.cssText = `border:0;height:800px;width:${{width}}px`;
            frame.onload = () => {{
                const root = frame.contentDocument.documentElement;
                const more = root.scrollWidth - root.clientWidth;
                out.append(`width ${{width}} needs ${{width + more}};`);
            }};
            frame.src = '{page}';
            document.body.append(frame);
        }}
        </script>"
    );
    std::fs::write(&outer, script).expect("a scratch file");
    browser.arg(format!("--user-data-dir={}", scratch.path("profile").display()));
    let run = browser.arg(format!("file://{}", outer.display())).output().expect("it runs");
    let (dom, log) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    let console = log.lines().filter(|line| line.contains("CONSOLE"));
    let mut faults: Vec<String> = console.map(str::to_owned).collect();
    for width in WIDTHS {
        let needs = dom
            .split_once(&format!("width {width} needs "))
            .and_then(|(_, rest)| rest.split(';').next()?.parse::<u32>().ok());
        match needs {
            Some(needs) if needs > width => faults.push(format!("{needs} px wide at {width} px")),
            Some(_) => {}
            None => faults.push(format!("not shown at {width} px: {dom}")),
        }
    }
    faults
}

/// A page with all charts.
fn page(scratch: &Scratch) {
    let (json, html) = (scratch.path("sweep.json"), scratch.path("page.html"));
    let ran = output(&format!(
        "sweep --range 1M --seeds 5 --verify 0 --guest-chunk none,64K --json {}",
        json.display()
    ));
    assert_eq!(code(&ran), 0, "{}", stderr(&ran));
    let ran = output(&format!(
        "compare --backend hosted --repeat 2 --range 4M --html {} --sweep {} --guest-chunk none \
         --guest-chunk 1M --policy chunk=4K --policy chunk=64K,contention=0.2 --policy hyperv",
        html.display(),
        json.display()
    ));
    assert_eq!(code(&ran), 0, "{}", stderr(&ran));
}

fn the_page_needs_no_network_and_has_its_figures() {
    let scratch = Scratch::new("html-text");
    page(&scratch);
    let page = std::fs::read_to_string(scratch.path("page.html")).expect("a page");
    for absent in ["http:", "https:", "<script", "src=", "@import", "url(h", "url(/", "NaN", "inf "]
    {
        assert!(!page.contains(absent), "{absent:?} in the page");
    }
    assert!(page.contains("prefers-color-scheme: dark"));
    // Two directions of three charts, and four heat maps; a table for each figure.
    assert_eq!(page.matches("<figure>").count(), 2 * 3 + 4);
    assert_eq!(page.matches("<figure>").count(), page.matches("<table>").count());
    assert!(page.matches("<svg").count() > 10);
    // The closed form is drawn beside the measurement.
    assert_eq!(page.matches("Measured and by the closed form").count(), 4);
    assert_eq!(page.matches("<svg").count(), page.matches("viewBox=").count());
}

fn the_page_is_fine_in_a_browser() {
    let scratch = Scratch::new("html-fine");
    page(&scratch);
    assert_eq!(faults(browser(), &scratch, "page.html"), [""; 0]);
}

fn a_page_that_is_not_fine_is_noticed() {
    let scratch = Scratch::new("html-bad");
    let bad = "<!DOCTYPE html><div style='width:900px'>wide</div><script>nothing.here</script>";
    std::fs::write(scratch.path("bad.html"), bad).expect("a scratch file");
    let faults = faults(browser(), &scratch, "bad.html").join("\n");
    assert!(faults.contains("at 380 px") && !faults.contains("at 1400 px"), "{faults}");
    assert!(faults.contains("nothing is not defined"), "{faults}");
}

fn main() -> std::process::ExitCode {
    harness(vec![
        (
            "the_page_needs_no_network_and_has_its_figures",
            Needs::Nothing,
            the_page_needs_no_network_and_has_its_figures,
        ),
        ("the_page_is_fine_in_a_browser", Needs::Chromium, the_page_is_fine_in_a_browser),
        ("a_page_that_is_not_fine_is_noticed", Needs::Chromium, a_page_that_is_not_fine_is_noticed),
    ])
}
