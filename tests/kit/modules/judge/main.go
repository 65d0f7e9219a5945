// Judge tells whether Kubernetes can use a certificate: it reads and verifies as kube-apiserver, etcd and client-go do.
//
// A line of JSON in (see question), a line of JSON out (see answer). It uses Go's standard library alone, since that
// is all that those three use for it.
package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log"
	"math/big"
	"net"
	"os"
	"time"
)

// question is one certificate file with its key, and where it is used.
type question struct {
	Chain [][]byte  // DER, the leaf first, as its file has them.
	Key   string    // PEM; empty: the pair is not loaded, and no connection made.
	Roots [][]byte  // DER: ca.crt.
	At    time.Time // The verifier's clock.
	Uses  []string  // server, client.
	Host  string    // What a client calls the server; empty: not looked at, and no server is tried.
}

// answer is why it can't be used, and who the leaf is: user and groups, as client authentication takes them.
type answer struct {
	Refused string
	User    string
	Groups  []string
	DNS     []string
	IPs     []string
}

var usages = map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 16<<20)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var asked question
		if err := json.Unmarshal(lines.Bytes(), &asked); err != nil {
			log.Fatalf("a question: %v", err)
		}
		if err := out.Encode(judged(&asked)); err != nil {
			log.Fatal(err)
		}
	}
	if err := lines.Err(); err != nil {
		log.Fatal(err)
	}
}

func judged(q *question) answer {
	chain, err := parsed(q.Chain)
	if err != nil {
		return answer{Refused: fmt.Sprintf("parse: %v", err)}
	}
	roots, err := pool(q.Roots)
	if err != nil {
		return answer{Refused: fmt.Sprintf("parse ca.crt: %v", err)}
	}
	leaf := chain[0]
	found := answer{User: leaf.Subject.CommonName, Groups: leaf.Subject.Organization, DNS: leaf.DNSNames}
	for _, ip := range leaf.IPAddresses {
		found.IPs = append(found.IPs, ip.String())
	}
	for _, use := range q.Uses {
		if err := verified(q, chain, roots, use); err != nil {
			found.Refused = fmt.Sprintf("%s: %v", use, err)
			return found
		}
	}
	if q.Key != "" {
		if err := served(q, roots); err != nil {
			found.Refused = err.Error()
		}
	}
	return found
}

func parsed(ders [][]byte) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for _, der := range ders {
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		all = append(all, certificate)
	}
	if len(all) == 0 {
		return nil, errors.New("no certificate")
	}
	return all, nil
}

func pool(ders [][]byte) (*x509.CertPool, error) {
	roots := x509.NewCertPool()
	all, err := parsed(ders)
	for _, certificate := range all {
		roots.AddCert(certificate)
	}
	return roots, err
}

// verified is what the request authenticator of kube-apiserver does, and what crypto/tls does for a server's name.
func verified(q *question, chain []*x509.Certificate, roots *x509.CertPool, use string) error {
	intermediates := x509.NewCertPool()
	for _, certificate := range chain[1:] {
		intermediates.AddCert(certificate)
	}
	usage, known := usages[use]
	if !known {
		return errors.New("no such use")
	}
	options := x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: q.At, KeyUsages: []x509.ExtKeyUsage{usage},
	}
	if use == "server" {
		options.DNSName = q.Host
	}
	_, err := chain[0].Verify(options)
	return err
}

// served loads the pair as each component does at its start, and makes the connections that it is for.
func served(q *question, roots *x509.CertPool) error {
	var file []byte
	for _, der := range q.Chain {
		file = append(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	pair, err := tls.X509KeyPair(file, []byte(q.Key))
	if err != nil {
		return fmt.Errorf("load pair: %w", err)
	}
	clock := func() time.Time { return q.At }
	for _, use := range q.Uses {
		server := &tls.Config{Certificates: []tls.Certificate{pair}, Time: clock}
		client := &tls.Config{RootCAs: roots, ServerName: q.Host, Time: clock}
		if use == "client" {
			server = &tls.Config{
				Certificates: []tls.Certificate{*other()}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots, Time: clock,
			}
			client = &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true, Time: clock}
		} else if q.Host == "" {
			continue
		}
		if err := connected(server, client); err != nil {
			return fmt.Errorf("%s's connection: %w", use, err)
		}
	}
	return nil
}

// connected makes one connection and says a byte each way: in TLS 1.3 a client hears of its refusal only then.
func connected(server, client *tls.Config) error {
	left, right := pipe()
	done := make(chan error, 1)
	go func() {
		defer left.Close()
		done <- echoed(tls.Server(left, server))
	}()
	defer right.Close()
	connection := tls.Client(right, client)
	_, said := connection.Write([]byte{1})
	if said == nil {
		_, said = connection.Read(make([]byte, 1))
	}
	right.Close()
	if err := <-done; err != nil && said != nil {
		return fmt.Errorf("%w; %w", said, err)
	}
	return said
}

var listener net.Listener

// pipe is a connection on this machine: net.Pipe has no buffer, and two that complain to each other would wait.
func pipe() (left, right net.Conn) {
	var err error
	if listener == nil {
		if listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			log.Fatal(err)
		}
	}
	if right, err = net.Dial("tcp", listener.Addr().String()); err != nil {
		log.Fatal(err)
	}
	if left, err = listener.Accept(); err != nil {
		log.Fatal(err)
	}
	for _, each := range []net.Conn{left, right} {
		each.SetDeadline(time.Now().Add(30 * time.Second))
		each.(*net.TCPConn).SetLinger(0) // thousands of them leave no port behind
	}
	return left, right
}

func echoed(connection *tls.Conn) error {
	heard := make([]byte, 1)
	if _, err := connection.Read(heard); err != nil {
		return err
	}
	_, err := connection.Write(heard)
	return err
}

var own *tls.Certificate

// other is the pair of the server that a client is tried against; no client verifies it.
func other() *tls.Certificate {
	if own == nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			log.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "judge"}}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			log.Fatal(err)
		}
		own = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	return own
}
